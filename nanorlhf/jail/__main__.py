"""Start a judge or a zygote: python -s -S -P -B __main__.py ROLE CONFIG DESCRIPTOR...

The package is imported as `jail` from the folder around it, so that nothing else of nanorlhf is run; then that folder
leaves the path again: the code that the zygote's children run finds the standard library there and nothing else.
"""

import importlib
import json
import os
import sys

role, config, *descriptors = sys.argv[1:]
sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
module = importlib.import_module(f"jail.{role}")
sys.path.pop()
module.main(json.loads(config), *map(int, descriptors))
