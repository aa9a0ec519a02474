FROM busybox AS parent
ONBUILD COPY a.txt /triggered
ONBUILD RUN echo ran > /ran
FROM parent
RUN [ "$(cat /triggered /ran)" = "$(printf 'a\nran')" ]
