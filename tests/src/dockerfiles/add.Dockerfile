FROM busybox
ADD archive.tar.gz /unpacked/
ADD archive.tar.xz /xz/
ADD archive.tar.bz2 /bzip2/
ADD a.txt /plain/
COPY archive.tar.gz /copied.tar.gz
ADD dir /dir
RUN [ "$(cat /unpacked/in/x)" = x ] && [ "$(readlink /unpacked/in/y)" = x ] && [ "$(stat -c '%u:%g %a' /unpacked/in/x)" = "5:6 640" ] && \
    [ "$(cat /xz/in/x /bzip2/in/x | tr -d '\n')" = xx ] && [ "$(stat -c '%u:%g %a' /xz/in/x)" = "5:6 640" ] && [ -f /plain/a.txt ] && [ -f /copied.tar.gz ] && [ -f /dir/sub/two ]
