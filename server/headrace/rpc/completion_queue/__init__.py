"""Hot calls and streams straight from grpcio's completion queue; all that touches its privates."""
