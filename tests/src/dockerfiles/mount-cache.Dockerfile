FROM busybox
RUN --mount=type=cache,target=/cache --mount=type=cache,target=/locked,sharing=locked,mode=700 echo kept > /cache/f && [ "$(stat -c %a /locked)" = 700 ]
RUN --mount=type=cache,target=/elsewhere,id=/cache [ ! -e /cache ] && [ "$(cat /elsewhere/f)" = kept ]
