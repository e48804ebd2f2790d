# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Attention of a ragged batch of queries over paged keys and values."""
