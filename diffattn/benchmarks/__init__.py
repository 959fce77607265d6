"""The programs behind `diffattn bench`: the variants, their interleaved timing, and the reports."""
