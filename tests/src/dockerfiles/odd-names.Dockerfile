FROM busybox
RUN mkdir -p "/o/a b" /o/ü && echo 1 > "/o/a b/f" && echo 2 > '/o/ü/$x' && n=$(printf %200s | tr ' ' l) && mkdir -p /o/$n/$n && echo 3 > /o/$n/$n/f
RUN n=$(printf %200s | tr ' ' l) && [ "$(cat "/o/a b/f" '/o/ü/$x' /o/$n/$n/f)" = "$(printf '1\n2\n3')" ]
