"""Not in the source distribution; modeling_tests/compatibility holds our own checks of export."""


class ExportTesterMixin:
    pass
