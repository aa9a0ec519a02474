FROM busybox
RUN cp /bin/busybox /su && chmod 4755 /su && mkdir -m 3777 /sticky && chown 1:1 /sticky && chmod 3777 /sticky && cp /bin/busybox /sg && chown 0:5 /sg && chmod 2711 /sg
RUN [ "$(stat -c '%a %u:%g' /su /sg /sticky | tr '\n' ' ')" = "4755 0:0 2711 0:5 3777 1:1 " ]
