"""The portability conformance suite: what every backend must do, as tests that a vendor installs and runs.

`windlass conform --accelerator NAME`, or `pytest --pyargs windlass.conformance --accelerator NAME`.
"""
