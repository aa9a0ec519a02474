FROM busybox
WORKDIR /a
WORKDIR b
ENV D=c
WORKDIR $D/../d
RUN [ "$(pwd)" = /a/b/d ] && touch here
WORKDIR /
RUN [ -f /a/b/d/here ] && [ "$(pwd)" = / ]
