FROM busybox
RUN --mount=type=tmpfs,target=/t/mp touch /t/mp/x && ls /t/mp > /listed
RUN [ ! -e /t/mp/x ] && [ "$(cat /listed)" = x ]
