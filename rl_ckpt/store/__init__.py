"""The storage floor: objects by name on a local disk, on S3 or on any other fsspec file system, and their commits.

`base.Store` is the one interface; `urls.open_store` picks the backend; everything above sees only these two.
"""
