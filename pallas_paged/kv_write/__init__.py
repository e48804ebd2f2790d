# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Writes of new keys and values into the paged pool: by page, by slice, by token."""
