FROM busybox
RUN mkdir -m 777 /shared
USER nobody
RUN [ "$(id -u)" = 65534 ] && touch /shared/mine && ! touch /etc/x
USER 7:8
RUN [ "$(id -u):$(id -g)" = 7:8 ]
USER root
RUN [ "$(stat -c %u /shared/mine)" = 65534 ]
