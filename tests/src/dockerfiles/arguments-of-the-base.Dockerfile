FROM busybox AS base
ARG GIVEN=default
ENV FROM_ARG=$GIVEN
FROM base
RUN [ "$FROM_ARG" = default ]
