FROM busybox AS base
RUN mkdir -m 750 /seeded && echo 1 > /seeded/a && chown 7 /seeded
FROM busybox
RUN --mount=type=cache,target=/cache --mount=type=cache,target=/locked,sharing=locked,mode=700 echo kept > /cache/f && [ "$(stat -c %a /locked)" = 700 ]
RUN --mount=type=cache,target=/seed,from=base,source=/seeded [ "$(cat /seed/a)" = 1 ] && echo 2 > /seed/a
RUN --mount=type=cache,target=/seed,from=base,source=/seeded [ "$(cat /seed/a)" = 2 ] && [ "$(stat -c '%a %u' /seed)" = "750 7" ]
RUN --mount=type=cache,target=/p,id=p,sharing=private --mount=type=cache,target=/q,id=p,sharing=private touch /p/f && [ ! -e /q/f ]
RUN --mount=type=cache,target=/elsewhere,id=/cache [ ! -e /cache ] && [ "$(cat /elsewhere/f)" = kept ]
