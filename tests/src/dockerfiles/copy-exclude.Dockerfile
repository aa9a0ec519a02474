FROM busybox
COPY --exclude=*.txt --exclude=dir/sub . /all/
COPY --exclude=sub dir /dir/
COPY --parents dir/sub/two a.txt /parents/
COPY --link a.txt /linked/
RUN [ ! -e /all/a.txt ] && [ -e /all/c.md ] && [ -e /all/dir/one ] && [ ! -e /all/dir/sub ] && [ ! -e /dir/sub ] && [ -e /dir/one ] && \
    [ -f /parents/dir/sub/two ] && [ -f /parents/a.txt ] && [ -f /linked/a.txt ]
