#!/usr/bin/env bash
# Makes the ten pages again: apt install chromium fonts-liberation imagemagick
set -euo pipefail
cd "$(dirname "$0")"

print() { # NAME WIDTH,HEIGHT
  chromium --headless --no-sandbox --disable-quic --disable-background-networking \
    --hide-scrollbars --window-size="$2" --screenshot="$1.png" "file://$PWD/$1.html"
}
for name in invoice table dark serif mono; do print "$name" 192,192; done
print chart 96,96
print scene 96,96
print list 96,192
print big 384,384

convert -size 192x192 xc:'#f7f7e8' -font Liberation-Sans -pointsize 13 -fill '#102030' \
  -draw "text 20,36 'fee: 47'" -draw "text 40,86 'desk: 129'" -draw "text 15,132 'mile: 680'" \
  -draw "text 60,176 'gate: 21'" -quality 88 magick.jpg
