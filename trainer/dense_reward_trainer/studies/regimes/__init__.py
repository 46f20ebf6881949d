"""SFT in several regimes; then policies that use the token reward, and controls that do not."""
