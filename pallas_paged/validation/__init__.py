# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""`validate`: checks, on the host, of values that only exist at run time."""
