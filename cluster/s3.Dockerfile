# The S3 server of docker-compose.yml: Ceph's object gateway from Debian, as the tests run it (cluster/ceph.py).
#   docker build -f cluster/s3.Dockerfile -t rl-ckpt-s3:16.2.15 .

FROM debian:12.11-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        radosgw=16.2.15* ceph-mon=16.2.15* ceph-osd=16.2.15* ceph-common=16.2.15* python3 \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o ceph -g ceph /data
COPY cluster/__init__.py cluster/ceph.py cluster/processes.py /opt/app/cluster/
ENV PYTHONPATH=/opt/app PYTHONDONTWRITEBYTECODE=1
USER ceph
WORKDIR /data
VOLUME /data
EXPOSE 8000
CMD ["python3", "-m", "cluster.ceph", "--dir", "/data", "--host", "0.0.0.0", "--port", "8000"]
