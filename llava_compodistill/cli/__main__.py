"""`python -m llava_compodistill.cli`, where the console command is not on the PATH."""

import sys

from . import main

sys.exit(main())
