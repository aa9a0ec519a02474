FROM busybox
MAINTAINER Somebody
LABEL one=1 "two words"="with blanks" three='3'
LABEL four 4 4
EXPOSE 80 443/tcp 53/udp 8000-8001
VOLUME /data /more
VOLUME ["/with blank"]
STOPSIGNAL SIGUSR1
HEALTHCHECK --interval=5s --timeout=3s --retries=2 CMD true
USER daemon:daemon
WORKDIR /srv
WORKDIR rel
ENV A=b
CMD ["sleep", "1"]
ENTRYPOINT ["/bin/sh", "-c"]
ONBUILD RUN true
SHELL ["/bin/busybox", "sh", "-ec"]
