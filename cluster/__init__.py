"""Files that run a cluster around rl_ckpt: containers, Kubernetes, AWS, and the same as plain processes.

`docs/cluster.md` says what each is for. `local` starts the topology of docker-compose.yml as processes of this machine;
`ceph` is the S3 server of both. Not part of the installed package: run from a checkout, `python -m cluster.local`.
"""
