FROM busybox AS first
RUN mkdir -p /out/sub && echo made > /out/file && ln /out/file /out/hard && ln -s file /out/soft && chown 3:4 /out/sub && chmod 2750 /out/sub
FROM scratch AS second
COPY --from=first /out /kept
FROM busybox
COPY --from=second /kept /kept
COPY --from=0 /out/soft /followed
COPY --from=busybox /bin/busybox /copied/
RUN [ "$(cat /kept/hard /kept/soft /followed)" = "$(printf 'made\nmade\nmade')" ] && \
    [ "$(stat -c '%u:%g %a' /kept/sub)" = "3:4 2750" ] && /copied/busybox true
