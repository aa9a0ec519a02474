FROM busybox
RUN mkdir -p /real/deep && ln -s /real /link && ln -s ../../../../real/deep /real/up && echo x > /real/target && ln -s target /real/file
COPY a.txt /link/a
COPY a.txt /real/up/
COPY dir /link/deep
COPY a.txt /real/file
RUN [ -f /real/a ] && [ -f /real/deep/a.txt ] && [ -f /real/deep/sub/two ] && [ -L /link ] && [ "$(cat /real/file)" = a ]
