# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What each command concludes from its rows; a module per command."""
