# Stands for redis: a user of its own (999), /data a volume that it owns, no protected mode.
FROM evenhand-standin/bookworm
RUN groupadd -r -g 999 redis \
 && useradd -r -u 999 -g redis redis \
 && apt-get update \
 && apt-get install -y --no-install-recommends redis-server redis-tools \
 && rm -rf /var/lib/apt/lists/* \
 && mkdir /data \
 && chown redis:redis /data
COPY redis-entrypoint.sh /usr/local/bin/docker-entrypoint.sh
VOLUME /data
WORKDIR /data
EXPOSE 6379
ENTRYPOINT ["docker-entrypoint.sh"]
CMD ["redis-server"]
