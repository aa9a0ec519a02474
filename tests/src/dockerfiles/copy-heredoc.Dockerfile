FROM busybox
ARG WHO=world
COPY <<a.txt <<"b.txt" /texts/
hello $WHO
a.txt
raw $WHO
b.txt
COPY --chmod=755 <<-EOF /usr/bin/greet
	#!/bin/sh
	echo greetings
EOF
RUN [ "$(cat /texts/a.txt /texts/b.txt)" = "$(printf 'hello world\nraw $WHO')" ] && [ "$(greet)" = greetings ]
