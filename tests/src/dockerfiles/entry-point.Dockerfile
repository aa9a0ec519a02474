FROM busybox AS base
CMD ["base"]
ENTRYPOINT ["first"]
FROM base
ENTRYPOINT ["second"]
