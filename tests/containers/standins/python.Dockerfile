# Stands for python:3.11-slim-bookworm: CPython in /usr/local, and what pip is told on this machine.
FROM evenhand-standin/bookworm
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates netbase tzdata libbz2-1.0 libcrypt1 libexpat1 libffi8 \
      liblzma5 libncursesw6 libnsl2 libreadline8 libsqlite3-0 libssl3 libtirpc3 libuuid1 zlib1g \
 && rm -rf /var/lib/apt/lists/*
COPY certificates.pem /etc/ssl/certs/ca-certificates.crt
COPY pip.conf /etc/pip.conf
COPY local /usr/local
RUN ldconfig \
 && printf '#!/usr/local/bin/python3.11\nimport sys\nfrom pip._internal.cli.main import main\nsys.exit(main())\n' > /usr/local/bin/pip \
 && chmod 755 /usr/local/bin/pip
ENV LANG=C.UTF-8 PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin
CMD ["python3"]
