-- The limiter's arithmetic (engine/policy/gcra.py) in whole numbers of any length: limbs of 7 digits, lowest first.
-- KEYS[1]: the latest moment seen; KEYS[2..]: one theoretical arrival time each, all in one hash slot.
-- ARGV[1] "take" or "settle"; ARGV[2] now in ns ("" = the server's clock); then for each key: rate, burst, units,
-- sign (1 or -1). A take checks all, then charges all. Replies {ok, ns by which the caller's clock was behind,
-- first key that can never pass or 0, how much each key is short of}; numbers as text.
local BASE, DIGITS = 10000000, 7

local function big(text)
  local limbs = {}
  for last = #text, 1, -DIGITS do
    limbs[#limbs + 1] = tonumber(string.sub(text, math.max(1, last - DIGITS + 1), last))
  end
  return limbs
end

local function trim(a)
  while #a > 1 and a[#a] == 0 do a[#a] = nil end
  return a
end

local function text(a)
  local parts = {string.format('%.0f', a[#a])}
  for i = #a - 1, 1, -1 do parts[#parts + 1] = string.format('%07.0f', a[i]) end
  return table.concat(parts)
end

local function less(a, b)
  if #a ~= #b then return #a < #b end
  for i = #a, 1, -1 do
    if a[i] ~= b[i] then return a[i] < b[i] end
  end
  return false
end

local function add(a, b)
  local out, carry = {}, 0
  for i = 1, math.max(#a, #b) do
    local sum = (a[i] or 0) + (b[i] or 0) + carry
    carry = sum >= BASE and 1 or 0
    out[i] = sum - carry * BASE
  end
  if carry > 0 then out[#out + 1] = carry end
  return out
end

local function minus(a, b) -- 0 where it would be less
  if less(a, b) then return {0} end
  local out, borrow = {}, 0
  for i = 1, #a do
    local rest = a[i] - (b[i] or 0) - borrow
    borrow = rest < 0 and 1 or 0
    out[i] = rest + borrow * BASE
  end
  return trim(out)
end

local function times(a, b)
  local out = {}
  for i = 1, #a + #b do out[i] = 0 end
  for i = 1, #a do
    local carry = 0
    for j = 1, #b do
      local sum = out[i + j - 1] + a[i] * b[j] + carry
      carry = math.floor(sum / BASE)
      out[i + j - 1] = sum - carry * BASE
    end
    out[i + #b] = carry
  end
  return trim(out)
end

local function rough(a)
  local sum = 0
  for i = #a, 1, -1 do sum = sum * BASE + a[i] end
  return sum
end

local asked = ARGV[2]
if asked == '' then
  local time = redis.call('TIME')
  asked = time[1] .. string.format('%06d', tonumber(time[2])) .. '000'
end
local now, behind = big(asked), {0}
local latest = redis.call('GET', KEYS[1])
if latest and less(now, big(latest)) then
  behind, now = minus(big(latest), now), big(latest)
end
redis.call('SET', KEYS[1], text(now), 'PX', 86400000)

local count = #KEYS - 1
local reply, charges, ok, never = {1, text(behind), 0}, {}, 1, 0
for n = 1, count do
  local at = 3 + 4 * (n - 1)
  local rate, burst, units, sign = big(ARGV[at]), big(ARGV[at + 1]), big(ARGV[at + 2]), ARGV[at + 3]
  local stood = times(now, rate)
  local kept = redis.call('GET', KEYS[n + 1])
  local paid = kept and big(kept) or {0}
  local short = {0}
  if ARGV[1] == 'take' then
    if less(burst, units) then
      ok = 0
      if never == 0 then never = n end
    end
    if kept then short = minus(add(paid, units), add(stood, burst)) end
    if text(short) ~= '0' then ok = 0 end
  end
  reply[n + 3] = text(short)
  local base = less(paid, stood) and stood or paid
  local new = sign == '1' and add(base, units) or minus(base, units)
  local most = add(stood, add(burst, burst))
  charges[n] = {less(most, new) and most or new, stood, rate}
end
if ok == 1 then
  for n = 1, count do
    local new, stood, rate = charges[n][1], charges[n][2], charges[n][3]
    local owed = minus(new, stood)
    if text(owed) == '0' then
      redis.call('DEL', KEYS[n + 1])
    else -- forgotten a second after it is paid back, when it equals one never seen
      local ms = math.min(rough(owed) / rough(rate) / 1e6 * 1.001 + 1000, 1e12)
      redis.call('SET', KEYS[n + 1], text(new), 'PX', string.format('%.0f', ms))
    end
  end
end
reply[1], reply[3] = ok, never
return reply
