FROM busybox
RUN mkdir -p /t/keep /t/drop && echo 1 > /t/keep/f && echo 2 > /t/drop/f && echo 3 > /t/file && ln -s x /t/link
RUN rm -r /t/drop && rm /t/file && rm /t/link && mkdir /t/file && echo new > /t/drop
RUN [ "$(cat /t/drop)" = new ] && [ -d /t/file ] && [ ! -e /t/link ] && [ ! -L /t/link ] && [ -f /t/keep/f ] && \
    rm -r /t/keep && mkdir /t/keep && touch /t/keep/g
RUN [ "$(ls /t/keep)" = g ] && chmod 711 /t && mv /t/keep /t/moved && mkfifo /t/pipe
RUN [ "$(stat -c %a /t)" = 711 ] && [ -f /t/moved/g ] && [ ! -e /t/keep ] && [ -p /t/pipe ]
