FROM busybox
COPY --chown=1:2 a.txt /a
COPY --chown=nobody:daemon --chmod=640 a.txt /made/b
COPY --chown=daemon dir /c
COPY --chmod=755 dir /d
RUN [ "$(stat -c '%u:%g' /a)" = 1:2 ] && [ "$(stat -c '%u:%g %a' /made/b)" = "65534:1 640" ] && \
    [ "$(stat -c '%u:%g' /c /c/sub/two | tr '\n' ' ')" = "1:1 1:1 " ] && [ "$(stat -c %a /d/one /d/sub)" = "$(printf '755\n755')" ]
