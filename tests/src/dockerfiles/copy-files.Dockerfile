FROM busybox
COPY a.txt b.txt /files/
COPY a.txt /renamed
COPY ["odd name.txt", "/odd dir/"]
WORKDIR /work
COPY a.txt .
COPY a.txt sub/dir/b
COPY bin/tool /usr/bin/
COPY a.txt /files
RUN [ "$(cat /files/a.txt /files/b.txt /renamed /work/a.txt /work/sub/dir/b)" = "$(printf 'a\nb\na\na\na')" ] && \
    [ -f "/odd dir/odd name.txt" ] && [ "$(tool)" = tool ] && [ "$(stat -c '%a %u:%g' /usr/bin/tool)" = "755 0:0" ]
