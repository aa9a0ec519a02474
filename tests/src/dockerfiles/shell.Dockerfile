FROM busybox
SHELL ["/bin/busybox", "sh", "-ec"]
RUN false || echo $0 > /zero; [ -s /zero ]
CMD echo $A
ENTRYPOINT run me
