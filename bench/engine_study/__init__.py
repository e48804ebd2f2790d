# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What page-aligned scheduling is worth in an engine: costs, simulation, and real steps."""
