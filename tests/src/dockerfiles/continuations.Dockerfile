# syntax=docker/dockerfile:1
# escape=`
FROM busybox
RUN echo a`
 b`
# not there
 c > /out && `
    [ "$(cat /out)" = "a b c" ]
ENV PLACE C:\dir
RUN [ "$PLACE" = 'C:\dir' ]
