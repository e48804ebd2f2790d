# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Attention of XLA's own operations: tiles of queries, blocks of gathered keys, a softmax."""
