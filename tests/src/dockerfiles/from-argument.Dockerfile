ARG STAGE=two
FROM busybox AS one
RUN echo one > /which
FROM busybox AS two
RUN echo two > /which
FROM $STAGE
RUN [ "$(cat /which)" = two ]
