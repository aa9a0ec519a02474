FROM busybox
ADD archive.tar.gz /unpacked/
ADD a.txt /plain/
COPY archive.tar.gz /copied.tar.gz
ADD dir /dir
RUN [ "$(cat /unpacked/in/x)" = x ] && [ "$(readlink /unpacked/in/y)" = x ] && [ "$(stat -c '%u:%g %a' /unpacked/in/x)" = "5:6 640" ] && \
    [ -f /plain/a.txt ] && [ -f /copied.tar.gz ] && [ -f /dir/sub/two ]
