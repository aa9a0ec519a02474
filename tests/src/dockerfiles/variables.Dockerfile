ARG BASE=busybox
ARG TAIL=tail
FROM ${BASE:-nothing}
ARG TAIL
ARG OWN=own-$TAIL
ENV A=1 B="two words" C=three\ words
ENV OLD a  b
ENV SET=$A$UNSET-${UNSET:-default}-${A:+plus} A=2
ENV FILE=/usr/lib/x.tar.gz
ENV BASENAME=${FILE##*/} STEM=${FILE%%.*} MOVED=${FILE/usr/opt}
RUN [ "$TAIL $OWN" = "tail own-tail" ] && [ "$A" = 2 ] && [ "$B|$C|$OLD" = "two words|three words|a  b" ]
RUN [ "$SET" = 1-default-plus ] && [ "$BASENAME $STEM $MOVED" = "x.tar.gz /usr/lib/x /opt/lib/x.tar.gz" ]
ARG A=hidden
RUN [ "$A" = 2 ]
ARG TARGETARCH
RUN [ "$TARGETARCH" = amd64 ]
