"""Makes labeled data sets from our own list of molecules; see `make_dataset`.

Nothing heavy is imported here: the chemistry libraries are an optional extra.
"""
