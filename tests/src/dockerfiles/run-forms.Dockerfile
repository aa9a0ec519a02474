FROM busybox
RUN echo shell $HOME > /shell
RUN ["sh", "-c", "echo exec > /exec"]
RUN <<EOF
set -e
echo first > /heredoc
echo second >> /heredoc
EOF
RUN <<EOF cat > /piped && echo after >> /piped
piped $((1 + 1))
EOF
RUN <<'SCRIPT'
#!/bin/awk -f
BEGIN { print "awk" > "/script" }
SCRIPT
RUN [ "$(cat /exec)" = exec ] && [ "$(cat /heredoc)" = "$(printf 'first\nsecond')" ] && \
    # a remark in a continuation

    [ "$(cat /piped)" = "$(printf 'piped 2\nafter')" ] && [ "$(cat /script)" = awk ] && [ -s /shell ]
