"""Methods compared on tasks: what is decoded, how it is timed, and what the times say."""
