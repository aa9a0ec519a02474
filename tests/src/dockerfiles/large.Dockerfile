FROM busybox
RUN dd if=/dev/zero of=/sparse bs=1 count=1 seek=20000000 2> /dev/null && seq 1 200000 > /numbers && for i in $(seq 300); do echo $i > /tmp/$i; done
RUN [ "$(stat -c %s /sparse)" = 20000001 ] && [ "$(tail -n 1 /numbers)" = 200000 ] && [ "$(ls /tmp | wc -l)" = 300 ]
