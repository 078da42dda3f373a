import sys

if sys.excepthook is sys.__excepthook__:  # Ctrl-C while the libraries are imported shows no traceback
    sys.excepthook = lambda kind, *error: kind is not KeyboardInterrupt and sys.__excepthook__(kind, *error)
