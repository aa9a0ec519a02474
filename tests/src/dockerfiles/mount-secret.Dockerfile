FROM busybox
RUN --mount=type=secret,id=token,required=true [ "$(cat /run/secrets/token)" = s3cret ] && [ "$(stat -c %a /run/secrets/token)" = 400 ]
RUN --mount=type=secret,id=token,target=/etc/token,mode=0440,gid=5 [ "$(stat -c '%a %g' /etc/token)" = "440 5" ]
RUN --mount=type=secret,id=missing [ ! -e /run/secrets/missing ] && [ ! -s /run/secrets/token ] && [ ! -s /etc/token ]
