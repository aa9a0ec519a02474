FROM busybox
COPY dir /new
COPY dir/ /new2/
COPY dir /tmp
COPY . /all
RUN [ "$(cat /new/one /new/sub/two /new2/one /tmp/one)" = "$(printf '1\n2\n1\n1')" ] && \
    [ "$(readlink /new/link)" = one ] && [ -f /new/.hidden ] && [ "$(stat -c %a /tmp)" = 1777 ] && \
    [ -d /all/dir/sub ] && [ ! -e /all/ignored ] && [ -e /all/keep.log ] && [ ! -e /all/drop.log ]
