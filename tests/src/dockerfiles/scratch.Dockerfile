FROM scratch
COPY a.txt /
COPY dir /d
ENV X=1
CMD ["/none"]
