FROM busybox AS other
RUN mkdir /o && echo other > /o/f
FROM busybox
WORKDIR /w
RUN --mount=type=bind,target=/ctx --mount=type=bind,from=other,source=/o,target=/in cat /ctx/a.txt /in/f > /out && [ ! -e /ctx/ignored ] && ! touch /ctx/x
RUN --mount=type=bind,source=dir,target=/rw,rw echo more > /rw/one && [ "$(cat /rw/one)" = more ]
RUN [ "$(cat /out)" = "$(printf 'a\nother')" ] && [ ! -e /ctx ] && [ ! -e /rw ] && [ ! -e /in ]
