FROM busybox AS base
ENV SHARED=yes
RUN echo base > /base
FROM base AS left
RUN echo left > /left
FROM base AS right
RUN echo right > /right
FROM busybox AS unused
RUN false
FROM left
COPY --from=right /right /right
RUN [ "$SHARED" = yes ] && [ "$(cat /base /left /right)" = "$(printf 'base\nleft\nright')" ]
