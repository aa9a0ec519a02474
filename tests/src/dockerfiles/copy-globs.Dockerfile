FROM busybox
COPY *.txt /txt/
COPY d?r/o* /one/
COPY [ab].txt /class/
COPY dir/*/two /deep/
COPY nothing* a.txt /maybe/
RUN [ "$(ls /txt | tr '\n' ' ')" = "a.txt b.txt odd name.txt " ] && [ -f /deep/two ] && \
    [ "$(ls /class | tr '\n' ' ')" = "a.txt b.txt " ] && [ "$(ls /maybe)" = a.txt ] && [ "$(ls /one)" = one ]
